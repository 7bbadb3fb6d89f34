{
  description = "A language model on servers of one's own";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;

      # gpt4all's wheel, and with it all that sets up an environment, exists for x86-64 alone; the tools exist for both.
      serving = [ "x86_64-linux" ];
      systems = serving ++ [ "aarch64-linux" ];

      packagesOf =
        system:
        import nixpkgs {
          inherit system;
          config.allowUnfreePredicate =
            package:
            builtins.elem (lib.getName package) [
              "packer"
              "terraform"
            ];
        };
      on = names: make: lib.genAttrs names (system: make (packagesOf system));

      # The image's Python.
      pythonOf = pkgs: pkgs.python313;
      # Wheels bring no C++ library of their own, and Nix's Python finds none that is the host's.
      wheelLibraries = pkgs: lib.makeLibraryPath [ pkgs.stdenv.cc.cc.lib ];

      # The service as one program: the sources of this flake, on the same wheels, checked by the same hashes, as `make
      # serve` and the image. What it depends on is no derivation: requirements.txt has a hash for each file that an
      # index may offer, but not which one is taken on which Python, so Nix would need a second list of all that is
      # pinned; and nixpkgs' own packages are other versions than those that were tested.
      serviceOf =
        pkgs:
        let
          python = pythonOf pkgs;
          pins = builtins.readFile ./service/requirements.txt;
          key = builtins.substring 0 12 (builtins.hashString "sha256" "${python} ${pins}");
        in
        pkgs.writeShellApplication {
          name = "mini-llm";
          runtimeInputs = [ python ];
          text = ''
            place="''${XDG_CACHE_HOME:-$HOME/.cache}/mini-llm/nix-${key}"
            mkdir -p "$place"
            ln -sfn ${self}/scripts ${self}/service "$place"
            (cd "$place" && python3 scripts/setup_venv.py service/requirements.txt)
            export LD_LIBRARY_PATH=${wheelLibraries pkgs} PYTHONPATH=${self}
            exec "$place/.venv/bin/python" -P -m service "$@"
          '';
        };

      # What the Makefile does in a checkout, with Nix's tools before the host's.
      target =
        pkgs: name: tools:
        pkgs.writeShellApplication {
          inherit name;
          runtimeInputs = [ pkgs.gnumake ] ++ tools;
          text = ''
            if ! [ -e scripts/setup_venv.py ]; then
              echo "error: this works on a checkout of mini-llm" >&2
              echo "  start it in its top folder" >&2
              exit 1
            fi
            exec make ${name} PYTHON=${pythonOf pkgs}/bin/python3 "$@"
          '';
        };

      app = description: package: {
        type = "app";
        program = lib.getExe package;
        meta = { inherit description; };
      };
    in
    {
      packages = on serving (pkgs: {
        default = serviceOf pkgs;
      });

      apps = on serving (pkgs: {
        serve = app "Serve a model on this machine" (
          pkgs.writeShellApplication {
            name = "serve";
            text = ''exec ${lib.getExe (serviceOf pkgs)} serve "$@"'';
          }
        );
        bake = app "Bake the image, prove it, make it what Terraform launches" (
          target pkgs "bake" [
            pkgs.git
            pkgs.packer
          ]
        );
        # What boots its servers is the host's (README): nixpkgs has not all of it, and it needs root.
        cloud = app "A Hetzner Cloud on this machine" (target pkgs "cloud" [ ]);
      });

      devShells = on systems (pkgs: {
        default = pkgs.mkShellNoCC {
          packages = [
            # what the Makefile types
            pkgs.gnumake
            (pythonOf pkgs)
            pkgs.uv
            pkgs.git
            # what bakes and launches
            pkgs.packer
            pkgs.terraform
            pkgs.opentofu
            pkgs.hcloud
            pkgs.openssh
            # what the tests use, but for what boots servers
            pkgs.chromedriver
            pkgs.chromium
            pkgs.curl
            pkgs.go
            pkgs.openssl
            pkgs.pebble
            pkgs.prometheus.cli
            pkgs.shellcheck
          ];
          LD_LIBRARY_PATH = wheelLibraries pkgs;
        };
      });

      # What `make test` calls that needs no package index: a build has no network, so the tests of the code itself,
      # which need the pinned requirements, run by `nix develop --command make unit`.
      checks = on systems (
        pkgs:
        let
          check =
            name: tools: commands:
            pkgs.runCommand name { nativeBuildInputs = tools; } ''
              export HOME="$TMPDIR" CHECKPOINT_DISABLE=1
              cd ${self}
              ${commands}
              touch "$out"
            '';
        in
        {
          lint = check "lint" [ pkgs.ruff ] "ruff check --no-cache --quiet .";
          scripts = check "scripts" [ pkgs.shellcheck ] ''
            shopt -s globstar nullglob
            shellcheck image/provision/*.sh tests/**/*.sh .ci/run
          '';
          terraform = check "terraform" [ pkgs.terraform ] "terraform -chdir=terraform fmt -check -recursive";
          packer = check "packer" [ pkgs.packer ] "packer fmt -check image";
          alerts = check "alerts" [ pkgs.prometheus.cli ] ''
            promtool check config --syntax-only image/rootfs/usr/share/mini-llm/stack/prometheus/prometheus.yaml
            promtool check rules image/rootfs/usr/share/mini-llm/stack/prometheus/alerts.yaml
            promtool test rules tests/image/alerts_test.yaml
          '';
        }
      );
    };
}
