"""Speed and exactness, measured: every timing is checked against the law before it is taken."""
