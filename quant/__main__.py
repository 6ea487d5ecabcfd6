"""``python -m quant``: the ``quant`` command of this interpreter's own installation."""

from quantize import main

if __name__ == "__main__":
    main()
