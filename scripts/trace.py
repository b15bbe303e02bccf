"""The command `jaxrnn trace` from a checkout: python scripts/trace.py --help."""

import sys

sys.path[0] = sys.path[0].removesuffix('scripts')  # else this folder's trace.py hides Python's own

from jaxrnn import cli

if __name__ == '__main__':
    sys.exit(cli.run('trace', sys.argv[1:]))
