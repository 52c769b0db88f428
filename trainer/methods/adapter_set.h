#pragma once
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "trainer/layers/model.h"
#include "trainer/methods/methods.h"
#include "trainer/methods/saved_adapter.h"

namespace corank {

/// Adapters by name over one base, of any methods, ranks, targets and modules_to_save; one of them, or none, is in use.
/// Those that rest are held here, outside the model: a forward pass knows only the one in use. Borrows the model, which
/// must come without an adapter, and the mesh.
class AdapterSet {
 public:
  static constexpr const char* kBase = "base";  ///< the name of none

  /// `merged`: the one in use is merged into the base (merge_adapter).
  AdapterSet(Model& model, const Mesh& mesh, at::ScalarType dtype, bool merged);
  ~AdapterSet();

  /// Collective over the mesh. Adds a checked adapter and leaves the base in use. ConfigError if the name is taken, is
  /// kBase, or holds anything but letters, digits, '.', '_' and '-'; InputError if the adapter does not fit the model.
  void load(const std::string& name, const SavedAdapter& file);
  /// Collective over the mesh. ConfigError, naming all, if there is no such adapter.
  void use(const std::string& name);
  const std::string& in_use() const { return in_use_; }
  /// In order of loading, without kBase.
  std::vector<std::string> names() const;

 private:
  struct Loaded;
  Loaded* find(const std::string& name) const;
  /// Takes back what the adapter that was in use did to frozen weights; false if it did nothing.
  bool restore_base();

  Model& model_;
  const Mesh& mesh_;
  at::ScalarType dtype_;
  bool merged_;
  std::vector<std::unique_ptr<Loaded>> adapters_;
  std::string in_use_ = kBase;
};

}  // namespace corank
