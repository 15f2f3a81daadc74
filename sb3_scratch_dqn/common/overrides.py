"""Detect overridden methods, which a fast path must not bypass."""


def is_overridden(instance: object, base: type, *names: str) -> bool:
    """Return True if ``instance`` might not use ``base``'s implementation of one of these methods.

    That is the case if a subclass overrides it, if the instance is monkey-patched, and for every object that is not an
    instance of ``base``: a proxy, such as the module that ``torch.compile`` returns, might do anything.

    :param instance: usually an instance of ``base`` or a subclass
    :param base: the class whose implementations count as not overridden
    :param names: names of the methods
    """
    cls = type(instance)
    if not issubclass(cls, base):
        return True
    attributes = vars(instance)
    if cls is base:
        return not attributes.keys().isdisjoint(names)
    return any(name in attributes or getattr(cls, name) is not getattr(base, name) for name in names)
