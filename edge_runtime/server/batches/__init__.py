"""Files and batches that clients leave here: kept on disk, worked through while nobody waits for an answer.

JSON lines and uploads enter; lines with answers leave. It calls the application in this process, as a client would,
and does not know how requests are answered.
"""
