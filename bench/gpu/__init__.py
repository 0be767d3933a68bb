"""`python -m bench gpu`: what a GPU can say of the kernels in eight minutes, what matters most first.

`program` lists the jobs in their order: checks, ceilings, times beside others, counters. `command` feeds them to a
`worker`, one process that may break and is begun anew, and writes the document whole after each: a run that is killed
has all that it finished. Kernels are compiled first, by as many workers as there are cores.
"""
