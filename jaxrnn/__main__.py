"""The command `jaxrnn` by another name: `python -m jaxrnn`."""

import sys

from jaxrnn import cli

if __name__ == '__main__':
    sys.exit(cli.main())
