"""The series of one sidecar."""

import re


class Metrics:
    """By name and labels, as they were when they were read."""

    def __init__(self, service, path="/stats/prometheus"):
        self.text = service.admin(path).body.decode()
        self.series = {}
        for line in self.text.splitlines():
            if line and not line.startswith("#"):
                name, labels, value = re.fullmatch(r"([a-zA-Z0-9_:]+)(?:\{(.*)\})? (\S+)", line).groups()
                labels = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels or ""))
                self.series.setdefault(name, []).append((labels, float(value)))

    def __call__(self, name, **wanted):
        """The sum of those that have these labels; `None` where there is none."""
        found = [value for labels, value in self.series.get(name, []) if wanted.items() <= labels.items()]
        return sum(found) if found else None

    def classes(self, name, **wanted):
        return [self(name, envoy_response_code_class=str(n), **wanted) for n in range(2, 6)]
