"""Text to token rows, on the host, with numpy only: nothing of ours is imported here and no JAX.

sources.py    corpora -> documents
tokenizer.py  byte-level BPE, GLM's special tokens
manifest.py   what a dataset folder holds, and the checks when it is opened
shards.py     ArrayRecord shards of documents
curation.py   source -> tokenizer + shards + manifest, atomically
fim.py        fill-in-the-middle
pipeline.py   shards -> training batches, resumable, independent of the number of processes
held_out.py   one exact pass over the held-out split
"""
