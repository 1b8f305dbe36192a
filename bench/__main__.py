"""`make bench`: every CPU benchmark, one after another, results into bench/results/."""

from __future__ import annotations

from bench import chain_speed, pass_time


def main() -> None:
    pass_time.main()
    chain_speed.main()


if __name__ == "__main__":
    main()
