"""`python -m rollcast` is `rollcast`."""

import sys

from rollcast.interpreter import hand_over

if __name__ == "__main__":
    hand_over(sys.argv[1:])
    from rollcast.cli import main

    main()
