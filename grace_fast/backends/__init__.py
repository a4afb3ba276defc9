"""Ways to find the nearest key, each a stateless module with `NAME`, `why_not` and `nearest`.

`why_not(workload)` says in words why the back end cannot take a call, or None where it can.
`nearest(queries, snapshot)` returns the nearest live row [B] int64 (-1 where there is none) and its
S [B] float64 in the canonical order. A module may also have `find(queries, snapshot)`, which
returns hit [B] bool, the row that hit [B] int64 (-1 where missed) and its S [B] float64 (inf where
missed). A back end accelerates; it never decides anything.
"""
