"""Many jobs from one file: a manifest, a ledger that several processes share, and executors.

:mod:`~quant.batch.manifest` reads what is asked and lists everything that is wrong with it at once.
:mod:`~quant.batch.ledger` keeps who works on what and what became of it, in a folder that machines may share.
:mod:`~quant.batch.attempt` is one job's process, :mod:`~quant.batch.run` the loop that decides which comes
next, and the executors say where: :mod:`~quant.batch.local` packs this machine, :mod:`~quant.batch.cluster`
asks Ray, :mod:`~quant.batch.submit` writes what Slurm and Kubernetes run.
"""
