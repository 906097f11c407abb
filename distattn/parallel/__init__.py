"""Context-parallel schedules as data: layouts, programs, schedulers, transports, executor, simulator."""

if __name__ != "distattn.parallel":
    raise ImportError(f"import distattn.parallel, not {__name__}: the folder at the repository's root is a link for readers")
