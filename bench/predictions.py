"""P."""
def main() -> None:
    """P."""
