"""Back ends, each a stateless module with `NAME`, `why_not`, and `nearest` or `find`.

`why_not(workload)` says in words why the back end cannot take a call, or None where it can.
`nearest(queries, snapshot)` returns the nearest live row [B] int64 (-1 where there is none) and its
S [B] float64 in the canonical order. `find(queries, snapshot, sums)` returns hit [B] bool, the row
that hit [B] int64 (-1 where missed) and, with `sums`, its S [B] float64 (inf where missed), else
None; where a module has none it follows from `nearest`. A back end accelerates; it never decides
anything.
"""
