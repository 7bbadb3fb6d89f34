# The packages by name, each a derivation that nobody can build. A name that is not here fails, as it does in nixpkgs.
{ system, config }:
let
  lib = import ./lib.nix;

  free = [
    "chromedriver"
    "chromium"
    "curl"
    "git"
    "gnumake"
    "go"
    "hcloud"
    "openssh"
    "openssl"
    "opentofu"
    "pebble"
    "python313"
    "ruff"
    "shellcheck"
    "uv"
  ];
  # Their license is the Business Source License.
  unfree = [
    "packer"
    "terraform"
  ];

  build =
    name: values:
    derivation (
      {
        inherit name system;
        builder = "/a-stand-in-builds-nothing";
      }
      // values
    );

  package = pname: build "${pname}-stand-in" { } // { inherit pname; };

  allowed =
    pname:
    let
      it = package pname;
    in
    if config.allowUnfreePredicate it then it else throw "nixpkgs refuses ${pname}: its license is unfree";
in
assert builtins.attrNames config == [ "allowUnfreePredicate" ];
assert !(config.allowUnfreePredicate (package "something-else"));
lib.genAttrs free package
// lib.genAttrs unfree allowed
// {
  prometheus = package "prometheus" // {
    cli = package "prometheus-cli";
  };

  stdenv.cc.cc.lib = package "gcc-lib";

  mkShellNoCC = { packages, ... }@values: build "nix-shell" values;

  runCommand =
    name: values: buildCommand:
    build name (values // { inherit buildCommand; });

  writeShellApplication =
    {
      name,
      text,
      runtimeInputs ? [ ],
    }:
    build name { inherit text runtimeInputs; } // { meta.mainProgram = name; };
}
