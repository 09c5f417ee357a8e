"""`python -m theworld_train`, the same as the command `theworld-train`."""

from theworld_train.cli.app import main

if __name__ == "__main__":
    main()
