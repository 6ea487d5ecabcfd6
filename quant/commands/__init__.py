"""The subcommands of ``quant`` and ``quant-deploy``: each parses, makes one library call and renders what it
returns. Nothing but the two programs imports this package; what a subcommand works with is imported when it
runs, so that ``--help`` stays fast."""
