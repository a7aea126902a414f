"""``python -m speechbrain_mrl`` is the command ``speechbrain-mrl``."""

from speechbrain_mrl.cli import run

if __name__ == "__main__":
    run()
