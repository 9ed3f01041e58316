"""`python -m proxy` is `joulegate`."""

from proxy.cli import main

if __name__ == "__main__":
    main()
