# SPDX-License-Identifier: Apache-2.0
# Debian's own interpreter and modules: that is what users have
PYTHON := /usr/bin/python3
PACKAGES := python3-psutil python3-docker python3-systemd python3-yaml python3-sdnotify python3-grpcio \
  python3-pytest python3-pytest-xdist python3-hypothesis python3-venv mmdebstrap systemd-container iproute2 procps util-linux openssl
LINTERS := ruff==0.17.6 mypy==2.4.1 types-PyYAML==6.0.12.20261122 types-requests==2.33.0.20261030
SUITE ?= bookworm
DNF_TREE := bookworm bookworm-dnf rpm,dnf,gnupg
SHELL := /bin/bash
export PYTHONDONTWRITEBYTECODE := 1

# $(call retry,COMMAND): up to three times, for what needs the network
retry = for try in 1 2 3; do if $(1); then break; elif [ $$try = 3 ]; then exit 1; else sleep $$((try * 10)); fi; done
# $(call apt,PACKAGES): install those that are missing
apt = dpkg -s $(1) >/dev/null 2>&1 || { export DEBIAN_FRONTEND=noninteractive; $(call retry,apt-get update -qq); \
  $(call retry,apt-get install -yqq --no-install-recommends $(1) >/dev/null); }
# $(call timed,NAME,COMMANDS)
timed = @TIMEFORMAT='== $(1): %0R s'; time { set -e; $(2); }

BUILD_PACKAGES := build-essential debhelper dh-python python3-all fakeroot scdoc rpm
REPO_PACKAGES := apt-utils createrepo-c gnupg gpg-agent
CHECK_PACKAGES := lintian rpmlint mandoc man-db zsh fish ansible-core
.PHONY: help setup demo lint test test-unit test-engine test-churn bench test-host test-packages install deb rpm repo clean
help:                 ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

setup:                ## install what the tests need (apt, and a venv for the linters)
	$(call timed,$@,$(call apt,$(PACKAGES)); \
	  [ "$$(cat .venv/made 2>/dev/null)" = "$(LINTERS)" ] || { rm -rf .venv; $(PYTHON) -m venv .venv; \
	  $(call retry,.venv/bin/pip -q --disable-pip-version-check install $(LINTERS)); echo "$(LINTERS)" >.venv/made; })

lint: setup           ## ruff and mypy --strict
	$(call timed,$@,.venv/bin/ruff check -q; .venv/bin/ruff format -q --check; .venv/bin/mypy)

test: lint test-unit test-engine   ## linters, types, unit and property tests, tests with real engines

# $(call tested,PYTEST ARGUMENTS): what fails on a loaded machine may pass by itself; what fails twice is broken
tested = $(PYTHON) -m pytest -q $(1) || { [ $$? = 1 ]; \
  echo '== tests failed: those that did run once more by themselves'; $(PYTHON) -m pytest -q --lf $(1) -n 0; }

test-unit: setup      ## unit and property tests, and those with real programs, servers and a journald of their own
	$(call timed,$@,$(call tested,-n 2 tests/unit tests/property tests/system))

# SLOW=1 on the command line: those marked slow too
FEWER := $(if $(SLOW),,-m 'not slow')
# Tests of engines mostly wait: three at a time, each with hosts of its own
test-engine: setup    ## tests with real engines in booted throw-away hosts (SLOW=1: the slow ones too)
	$(call timed,$@,tests/host/mkhost bookworm >/dev/null; $(call tested,-n 3 --dist loadfile $(FEWER) tests/containerd tests/engine))

demo: setup           ## boot a throw-away host, make real orphans, see orphand end them
	@$(call apt,$(BUILD_PACKAGES))
	@tests/host/demo

# make test-churn N=5100 SEED=7 CGROUP=v1 EVERY=100 SAVE=out   (python3 -m tests.churn --help)
N ?= 300
EVERY ?= 50
CGROUP ?= v2
test-churn: setup     ## N container lives on real engines with orphans among them (N=300 CGROUP=v2 EVERY=50 [SEED=] [SAVE=])
	$(call timed,$@,$(PYTHON) -m tests.churn --lives $(N) --every $(EVERY) --cgroup $(CGROUP) --suite $(SUITE) \
	  $(if $(SEED),--seed $(SEED)) $(if $(SAVE),--save $(SAVE)))

# BENCH="--quick" or others of `python3 -m tests.bench --help`; without, the whole, into docs/bench
BENCH ?=
bench: setup          ## orphand next to what people use, into docs/bench (BENCH=--quick: small, into .cache)
	$(call timed,$@,tests/host/mkhost bookworm bookworm-bench fail2ban >/dev/null; \
	  $(PYTHON) -m venv .cache/bench/venv; \
	  $(call retry,.cache/bench/venv/bin/pip -q --disable-pip-version-check install -r tests/bench/requirements.txt); \
	  $(PYTHON) -m tests.bench --plots .cache/bench/venv/bin/python $(BENCH))

# Where things go; the package builds say so where their distribution differs
PREFIX ?= /usr
SYSCONFDIR ?= /etc
UNITDIR ?= $(PREFIX)/lib/systemd/system
PRESETDIR ?= $(PREFIX)/lib/systemd/system-preset
CATALOGDIR ?= $(PREFIX)/lib/systemd/catalog
MANDIR ?= $(PREFIX)/share/man
BASHDIR ?= $(PREFIX)/share/bash-completion/completions
ZSHDIR ?= $(PREFIX)/share/zsh/site-functions
FISHDIR ?= $(PREFIX)/share/fish/vendor_completions.d
SHARE := $(PREFIX)/share/orphand
INSTALL := install -D -m 644

install:              ## install under DESTDIR (what both package builds call; needs scdoc)
	find orphand -name '*.py' -exec sh -c 'for f; do $(INSTALL) "$$f" "$(DESTDIR)$(SHARE)/$$f"; done' sh {} +
	install -D -m 755 packaging/bin/orphand $(DESTDIR)$(PREFIX)/bin/orphand
	$(INSTALL) packaging/orphand.yaml $(DESTDIR)$(SYSCONFDIR)/orphand.yaml
	$(INSTALL) packaging/orphand.d.README $(DESTDIR)$(SYSCONFDIR)/orphand.d/README
	$(INSTALL) systemd/orphand.service $(DESTDIR)$(UNITDIR)/orphand.service
	$(INSTALL) systemd/notify-reload.conf $(DESTDIR)$(SHARE)/notify-reload.conf
	$(INSTALL) systemd/90-orphand.preset $(DESTDIR)$(PRESETDIR)/90-orphand.preset
	$(INSTALL) systemd/orphand.catalog $(DESTDIR)$(CATALOGDIR)/orphand.catalog
	install -d $(DESTDIR)$(MANDIR)/man8 $(DESTDIR)$(MANDIR)/man5
	scdoc <docs/man/orphand.8.scd >$(DESTDIR)$(MANDIR)/man8/orphand.8
	scdoc <docs/man/orphand.yaml.5.scd >$(DESTDIR)$(MANDIR)/man5/orphand.yaml.5
	$(INSTALL) packaging/completion/orphand.bash $(DESTDIR)$(BASHDIR)/orphand
	$(INSTALL) packaging/completion/_orphand $(DESTDIR)$(ZSHDIR)/_orphand
	$(INSTALL) packaging/completion/orphand.fish $(DESTDIR)$(FISHDIR)/orphand.fish

deb:                  ## the Debian package, in dist/
	@$(call apt,$(BUILD_PACKAGES))
	packaging/build deb dist

rpm:                  ## the RPM, in dist/
	@$(call apt,$(BUILD_PACKAGES))
	packaging/build rpm dist

repo: deb rpm         ## both packages, signed, into the testing channel of REPO=DIR with REPO_KEY=ADDRESS (docs/packaging.md)
	@$(call apt,$(REPO_PACKAGES))
	packaging/repo/repo add "$(REPO)" dist/orphand_*_all.deb dist/orphand-*.noarch.rpm

test-host: setup      ## the DEB on a booted host: SUITE=bullseye, bookworm, trixie or sid; CGROUP=v1 for the old ones
	@$(call apt,$(BUILD_PACKAGES) $(REPO_PACKAGES))
	$(call timed,$@ $(SUITE),tests/host/mkhost $(SUITE) >/dev/null; \
	  export SUITE=$(SUITE) CGROUP=$(CGROUP); $(call tested,tests/host/test_host.py))

test-packages: setup  ## lint, reproducibility, signatures, dnf and Ansible
	@$(call apt,$(BUILD_PACKAGES) $(REPO_PACKAGES) $(CHECK_PACKAGES))
	$(call timed,$@,tests/host/mkhost bookworm >/dev/null; tests/host/mkhost $(DNF_TREE) >/dev/null; \
  tests/host/mkhost bookworm bookworm-ansible python3-apt >/dev/null; \
	  $(PYTHON) -m pytest -q tests/host/test_packages.py)

clean:                ## remove what these targets made, and the cached host trees
	rm -rf .cache .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
