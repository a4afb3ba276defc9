"""Programs on top of the library: command line, reports, evaluations, benchmarks, metrics."""
