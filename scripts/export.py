"""The command `jaxrnn export` from a checkout: python scripts/export.py --help."""

import sys

sys.path[0] = sys.path[0].removesuffix('scripts')  # else this folder's bisect.py hides Python's own

from jaxrnn import cli

if __name__ == '__main__':
    sys.exit(cli.run('export', sys.argv[1:]))
