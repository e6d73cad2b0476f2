"""`python -m sami_ppl` is `sami`."""

from sami_ppl.cli import main

if __name__ == "__main__":
    main()
