#include "launch/same_start.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <string_view>

#include "comm/agree.h"
#include "comm/backends.h"
#include "data/file.h"
#include "launch/versions.h"

namespace corank {
namespace {

constexpr std::array kSharedFamilies = {"NCCL_", "OMPI_MCA_btl", "OMPI_MCA_coll", "OMPI_MCA_mtl", "OMPI_MCA_pml"};
constexpr std::array kSharedNames = {
    "ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "MKL_CBWR",        "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",     "NVIDIA_TF32_OVERRIDE",    "OMP_NUM_THREADS", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"};
/// Of these families what each host may have for itself.
constexpr std::array kOwnParts = {"_IFNAME", "_if_include", "_if_exclude", "_HOSTID",
                                  "_DEBUG",  "_DUMP_FILE",  "_TOPO_FILE",  "_IB_HCA"};

bool is_shared(std::string_view name) {
  if (std::find(kSharedNames.begin(), kSharedNames.end(), name) != kSharedNames.end()) return true;
  const auto begins = [&](const char* family) { return name.starts_with(family); };
  const auto has = [&](const char* part) { return name.find(part) != std::string_view::npos; };
  return std::any_of(kSharedFamilies.begin(), kSharedFamilies.end(), begins) &&
         std::none_of(kOwnParts.begin(), kOwnParts.end(), has);
}

std::vector<std::string> own_environment() {
  std::vector<std::string> all;
  for (char** entry = environ; *entry; ++entry) all.emplace_back(*entry);
  return all;
}

std::string on_lines(const std::vector<std::string>& texts) { return fmt::format("{}", fmt::join(texts, "\n")); }

Fact program_fact() {
  return {"program", "SHA-256 " + sha256_of_file("/proc/self/exe"), "Install the same build on every host."};
}

/// Of ranks that run one program: their number depends on it.
std::vector<Fact> surrounding_facts(const std::vector<std::string>& command_line) {
  std::vector<Fact> facts{{"command line", on_lines(command_line), "Start every rank with the same one."}};
  for (const auto& [name, version] : loaded_versions()) {
    facts.push_back({name, version,
                     "Install the same libraries on every host; CPUs of several kinds compute alike with "
                     "ATEN_CPU_CAPABILITY=avx2 on all."});
  }
  std::string components;
  for (const auto& [name, value] : mpi_settings({"btl", "coll", "mtl", "pml"})) {
    components += fmt::format("{}={}\n", name, value);
  }
  facts.push_back({"Open MPI's components", components, "Give mpirun the same --mca options for all hosts."});
  facts.push_back({"settings", shared_settings(own_environment()),
                   "Set them alike on every host; mpirun hands one on with -x NAME, srun with --export=ALL."});
  return facts;
}

}  // namespace

std::string shared_settings(const std::vector<std::string>& environment) {
  std::vector<std::string> shared;
  for (const std::string& entry : environment) {
    if (is_shared(std::string_view(entry).substr(0, entry.find('=')))) shared.push_back(entry);
  }
  std::sort(shared.begin(), shared.end());
  return on_lines(shared);
}

void require_no_peers(const World& world) {
  const char* tasks = std::getenv("SLURM_STEP_NUM_TASKS");
  if (!tasks || world.size() > 1 || std::string_view(tasks) == "1") return;
  throw ConfigError(
      fmt::format("srun started {} tasks, but this one is alone: MPI was told of no others. Start them with srun "
                  "--mpi=pmix, or with mpirun inside the allocation.",
                  tasks));
}

void require_same_start(const World& world, const std::vector<std::string>& command_line) {
  if (world.size() == 1) return;
  Ledger ledger;
  const auto all = make_communicator("mpi", world, ledger);
  require_same(*all, {program_fact()});
  require_same(*all, surrounding_facts(command_line));
}

RunConfig read_same_run(const std::string& path, const std::vector<std::string>& overrides, const World& world) {
  Ledger ledger;
  const auto all = make_communicator("mpi", world, ledger);
  RunConfig run;
  on_each_rank(*all, [&] { run = read_run(path, overrides); });
  require_same(*all, {{"run file " + path, run.yaml(), "Give every host the same run file."}});
  return run;
}

std::string describe_hosts(const World& world) {
  std::vector<std::string> parts{fmt::format("hosts {} (rank 0 on {})", world.hosts(), host_name())};
  for (const auto& [name, version] : backend_versions())
    parts.push_back(name == "MPI" ? version : name + " " + version);
  for (const auto& [name, value] : mpi_settings({"btl_tcp_if_include", "oob_tcp_if_include"})) {
    if (world.hosts() > 1 || !value.empty()) parts.push_back(fmt::format("{} {}", name, value.empty() ? "any" : value));
  }
  for (const std::string& entry : own_environment()) {
    if (entry.starts_with("NCCL_")) parts.push_back(entry);
  }
  return fmt::format("{}", fmt::join(parts, ", "));
}

}  // namespace corank
