"""`python -m rollcast` is `rollcast`."""

from rollcast.cli import main

if __name__ == "__main__":
    main()
