"""``python -m stable_opd`` does what ``stable-opd`` does."""

from stable_opd.cli import main

if __name__ == "__main__":
    main()
