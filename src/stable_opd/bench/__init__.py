"""Combinations of components beside each other: a spec becomes runs of `stable-opd fit`, and the runs become tables.

`spec` reads and checks what is asked for; `expand` and `recipes` turn it into command lines; `folder`, `process`,
`child` and `schedule` run them; `figures` and `statistics` say what came out; `results`, `tables` and `plots` show it.
"""
