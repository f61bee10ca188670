"""The order of things: which stage follows which. Importing this sets what must be set before Prefect is."""

from flows import settings

settings.apply()
