"""Which of the errors of a failed task group must the user read?"""


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first single error inside nested groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
