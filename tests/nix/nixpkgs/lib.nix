# What flake.nix uses of nixpkgs' library, with the same meaning.
rec {
  genAttrs =
    names: make:
    builtins.listToAttrs (
      map (name: {
        inherit name;
        value = make name;
      }) names
    );

  getName = package: package.pname or (builtins.parseDrvName package.name).name;

  getExe = package: "${package}/bin/${package.meta.mainProgram}";

  makeLibraryPath = packages: builtins.concatStringsSep ":" (map (package: "${package.lib or package}/lib") packages);
}
