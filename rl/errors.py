"""Which of the errors of a failed task group must the user read?"""


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first single error inside nested groups."""
    first = group.exceptions[0]
    if isinstance(first, BaseExceptionGroup):
        return first_error(first)  # pyright: ignore[reportUnknownArgumentType]
    return first
