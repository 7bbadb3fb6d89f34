{
  description = "A small stand-in for nixpkgs: flake.nix is evaluated against it, and nothing in it can be built";

  outputs = _: {
    lib = import ./lib.nix;
    # Where nixpkgs has every name of default.nix and lib.nix. Whoever pins another looks there again.
    revision = "5880666fd9eb563038431edb35c2d0aa595884e6";
  };
}
