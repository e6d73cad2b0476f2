"""`python -m sami_ppl` is `sami`."""

from sami_ppl.runs.cli import main

if __name__ == "__main__":
    main()
