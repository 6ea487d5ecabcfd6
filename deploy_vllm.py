#!/usr/bin/env python3
"""The ``quant-deploy`` command."""
