"""Whether users replaced methods that a short cut would leave out."""


def replaced(instance: object, base: type, *names: str) -> bool:
    """Return True if one of these methods of ``base`` may not be what ``instance`` does.

    That is so if a subclass overrides it, if it was patched on the instance, and for every object that is not of the
    class: a proxy, such as what ``torch.compile`` returns, may do anything.

    :param instance: mostly of ``base`` or a subclass
    :param base: the class whose methods count as not replaced
    :param names: of the methods
    """
    kind = type(instance)
    if not issubclass(kind, base):
        return True
    own = vars(instance)
    if kind is base:
        return not own.keys().isdisjoint(names)
    return any(name in own or getattr(kind, name) is not getattr(base, name) for name in names)
