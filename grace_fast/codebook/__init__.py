"""Rows in memory: keys, values, radii and labels, one writer, any number of readers.

Codebook     codebook.py    the newest version, its writer's lock, who is told before it is seen
Snapshot     snapshot.py    one version: a row count and pages; never changes
Draft        draft.py       the next version, until it is published
Page         pages.py       what may change of 4 096 rows, copied when it is written
Slots        slots.py       keys, values, labels, ids: only ever added to, in the memory of
                            buffers.py, device_memory.py or a mapped file (mapped.py)
Cache        caches.py      what look-ups compute of a version, and when it is stale
Change       diff.py        the way from one version to another
"""
