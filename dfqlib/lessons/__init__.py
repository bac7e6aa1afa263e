"""Code shared by the notebooks: teachers and images, plots, widgets, toy models, reruns; the library uses none."""

from dfqlib.lessons.subject import Subject, Tuned, choose_arch, from_noise, open_subject, real_images, tune

__all__ = ["Subject", "Tuned", "choose_arch", "from_noise", "open_subject", "real_images", "tune"]
