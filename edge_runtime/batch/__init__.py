"""Thousands of questions → a file of answers, one JSON line each, which a later run continues.

Enter: files, folders and lines of jobs; whatever answers them. Leave: lines in the order in which they are ready, or
in that of the questions. Does not know the command line, nor whether a model is here, on a server or on a cluster.
"""
