"""The two contracts: schema, fake implementation and autograd of ``recurrence`` and ``attention``."""
