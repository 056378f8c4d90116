"""`python -m titan_train`, which is how torchrun starts it."""

from titan_train.cli import main

if __name__ == "__main__":
    main()
