# SPDX-License-Identifier: Apache-2.0
# Debian's own interpreter and modules: that is what users have
PYTHON := /usr/bin/python3
PACKAGES := python3-psutil python3-docker python3-systemd python3-yaml python3-sdnotify python3-pytest python3-hypothesis python3-venv

.PHONY: help setup lint test
help:                 ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup:                ## install what the tests need (apt, and a venv for the linters)
	@dpkg -s $(PACKAGES) >/dev/null 2>&1 || { apt-get update -q && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends $(PACKAGES); }
	@[ -x .venv/bin/ruff ] || { $(PYTHON) -m venv .venv && \
	  .venv/bin/pip -q install ruff mypy types-PyYAML types-requests; }

lint: setup           ## ruff and mypy --strict
	.venv/bin/ruff check orphand tests
	.venv/bin/mypy

test: setup           ## unit and property tests
	$(PYTHON) -m pytest -q tests/unit tests/property
