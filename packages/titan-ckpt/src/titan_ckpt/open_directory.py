"""The checkpoint directory at a path or URL, whichever kind it is."""

from titan_ckpt.directory import Directory, Report
from titan_ckpt.local_directory import LocalDirectory
from titan_ckpt.location import Location, place_of
from titan_ckpt.place import Place
from titan_ckpt.remote_directory import RemoteDirectory


def open_directory(location: Location, report: Report = lambda message: None) -> Directory:
    """The checkpoint directory at a path or URL."""
    place = place_of(location)
    return RemoteDirectory(place, report) if place.path is None else LocalDirectory(place, report)


def candidates(location: Location) -> list[Place]:
    """Folders in a directory that may hold a checkpoint, newest first."""
    return open_directory(location).candidates()
