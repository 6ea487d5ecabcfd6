"""The production checklist: what a served model promises, measured at its endpoint.

:mod:`~quant.serving.check.run` walks the tables of the groups, one module each; a row is a named function of
a :class:`~quant.serving.check.context.Context` that gives findings.
"""
