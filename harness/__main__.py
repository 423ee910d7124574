"""`python -m harness VERB ...`: what launchers end in."""

from harness.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
