"""Every error the project raises on purpose, in one tree.

    CtsError
      InputError                what came from outside is wrong: never retried
        ConfigError             an option, argument or configuration key
        BaseModelError          the base model's folder cannot be used
        AdapterRefused          one adapter cannot be accepted; the others go on   .adapter_id .reason
        AdapterChanged          an adapter's file was replaced during the job      .adapter_id
        BundleError             a manifest or an object is not what it should be
        PlacementError          the bundle does not fit the devices
        UnknownAdapter          no such adapter in the serving map
        RequestError            a generation request that cannot be answered       .param .code
      StoreError                the object store
        StoreMissing            no such bucket, folder or object
        StoreForbidden          credentials are missing, wrong, or not allowed
        StoreUnreachable        no connection, throttled to the end, or a cut answer: already retried
        StoreConflict           a conditional write or read found something else
        StoreUnsafe             the store ignores conditional writes
      PublishConflict           another job moved CURRENT first
      NotEnoughMemory           a step of the job takes more than it may, or than any node has
      WouldDrop                 adapters that are served would no longer be, and nobody asked for it
      ServeError
        HomeUnavailable         the cluster (or factors) of an adapter is not being served
        EngineStopped           the engine is not running

A message names the thing, what was seen, what was expected, and what to do.
All of them survive pickling, because Ray carries them between processes.
"""

from __future__ import annotations


class CtsError(Exception):
    """Root of the tree."""


class InputError(CtsError):
    """What came from outside is wrong; trying again would not help."""


class ConfigError(InputError):
    """An option, argument or configuration key."""


class BaseModelError(InputError):
    """The base model's folder cannot be used."""


class AdapterRefused(InputError):
    """One adapter cannot be accepted. ``reason`` is a short, stable word for reports and manifests."""

    def __init__(self, adapter_id: str, reason: str, message: str) -> None:
        super().__init__(adapter_id, reason, message)
        self.adapter_id = adapter_id
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"adapter {self.adapter_id!r} refused ({self.reason}): {self.message}"


class AdapterChanged(InputError):
    """An adapter's file was replaced between the two passes of the job."""

    def __init__(self, adapter_id: str, message: str) -> None:
        super().__init__(adapter_id, message)
        self.adapter_id = adapter_id
        self.message = message

    def __str__(self) -> str:
        return f"adapter {self.adapter_id!r} changed during the job: {self.message}"


class BundleError(InputError):
    """A manifest or an object is not what it should be."""


class PlacementError(InputError):
    """The bundle does not fit the devices it should be served on."""


class UnknownAdapter(InputError):
    """No such adapter in the serving map."""


class RequestError(InputError):
    """A generation request that cannot be answered. ``param`` names the offending field, where there is one, and
    ``code`` OpenAI's name for what is wrong with it."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.message, self.param, self.code = message, param, code

    def __str__(self) -> str:
        return self.message


class StoreError(CtsError):
    """The object store."""


class StoreMissing(StoreError):
    """No such bucket, folder or object."""


class StoreForbidden(StoreError):
    """Credentials are missing, wrong, or do not allow this."""


class StoreUnreachable(StoreError):
    """No connection, throttled to the end, or a cut answer; the bounded retries are already spent."""


class StoreConflict(StoreError):
    """A conditional write or read found something other than expected."""


class StoreUnsafe(StoreError):
    """The store ignores conditional writes, so nothing can be published on it safely."""


class PublishConflict(CtsError):
    """Another job moved CURRENT first."""


class NotEnoughMemory(CtsError):
    """A step of the job takes more memory than it may, or than any node has: given more, the job goes on."""


class WouldDrop(CtsError):
    """Adapters that are served would no longer be, and nobody asked for it. Nothing was published."""


class ServeError(CtsError):
    """The serving side."""


class HomeUnavailable(ServeError):
    """The cluster, or the factors, that an adapter needs are not being served."""


class EngineStopped(ServeError):
    """The engine is not running."""
