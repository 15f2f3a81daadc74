"""What users put in the place of methods, which short cuts past these methods must heed."""


def replaced(instance: object, base: type, *names: str) -> bool:
    """Whether a subclass overrides one of these methods of ``base``, or somebody patched it on the instance.

    :param instance: of ``base`` or a subclass
    :param base: the class whose methods count as not replaced
    :param names: of the methods
    """
    own, kind = vars(instance), type(instance)
    if kind is base:
        return not own.keys().isdisjoint(names)
    return any(name in own or getattr(kind, name) is not getattr(base, name) for name in names)
