"""Start a command on ranks: local processes here; clusters in time."""

if __name__ != "distattn.launchers":
    raise ImportError(f"import distattn.launchers, not {__name__}: the folder at the repository's root is a link for readers")
