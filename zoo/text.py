"""Messages in one line."""


def one_line(value: object, most: int = 300) -> str:
    """What an error or any other value says, in one line of at most `most` characters."""
    return " ".join((str(value) or type(value).__name__).split())[:most]


def reason(error: object) -> str:
    """Why something failed, in one line: of an operating system's error the reason alone, without the path."""
    return one_line(getattr(error, "strerror", None) or error)
