"""Combinations of components beside each other: a spec becomes runs of `stable-opd fit`, and the runs become tables.

`spec` reads and checks what is asked for, `expand` and `recipes` turn it into command lines, `folder` knows what a run
leaves behind, `process` and `schedule` run it, `results`, `figures` and `statistics` say what came out, and `tables` and
`plots` show it.
"""
