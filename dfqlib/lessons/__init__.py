"""What notebooks share: a lesson's teacher and images, plots, widgets, toys, reruns. The library needs none of it."""

from dfqlib.lessons.subject import Subject, Tuned, choose_arch, from_noise, open_subject, real_images, tune

__all__ = ["Subject", "Tuned", "choose_arch", "from_noise", "open_subject", "real_images", "tune"]
