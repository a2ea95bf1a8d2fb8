// From addresses to names and lines, for messages.
#include <dlfcn.h>

#include <cstdio>

#include "simt/machine.h"

namespace simt {
namespace {

const Dl_info& own_library() {
  static const Dl_info info = [] {
    Dl_info found{};
    dladdr(reinterpret_cast<const void*>(&machine), &found);
    return found;
  }();
  return info;
}

struct Frame {
  std::string function, file;  // file:line
};

// The functions at an address, the innermost of the inlined ones first. Empty without binutils or debug information.
std::vector<Frame> frames_of(uint32_t place) {
  char command[1024];
  std::snprintf(command, sizeof(command), "LD_PRELOAD= addr2line -i -f -C -e '%s' 0x%x 2>/dev/null",
                own_library().dli_fname, place);
  std::vector<Frame> frames;
  FILE* const pipe = popen(command, "r");
  if (pipe == nullptr) return frames;
  char line[4096];
  std::vector<std::string> lines;
  while (std::fgets(line, sizeof(line), pipe) != nullptr) {
    lines.push_back(line);
    lines.back().erase(lines.back().find_last_not_of('\n') + 1);
  }
  pclose(pipe);
  for (size_t i = 0; i + 1 < lines.size(); i += 2) {
    const std::string file = lines[i + 1].substr(0, lines[i + 1].find(" ("));
    if (file.substr(0, 2) == "??") return frames;
    frames.push_back({lines[i], short_path(file)});
  }
  return frames;
}

std::string index_text(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

// A function's name without namespaces and arguments.
std::string bare_name(std::string name) {
  const std::string anonymous = "(anonymous namespace)::";
  for (size_t at; (at = name.find(anonymous)) != std::string::npos;) name.erase(at, anonymous.size());
  if (name.compare(0, 5, "void ") == 0) name.erase(0, 5);
  name = name.substr(0, name.find('('));
  const size_t arguments = name.find('<');
  const size_t last = name.rfind("::", arguments);
  return last == std::string::npos ? name : name.substr(last + 2);
}

}  // namespace

std::string short_path(const std::string& path) {
  const size_t source = path.rfind("/csrc/"), test = path.rfind("/tests/");
  return source != std::string::npos ? path.substr(source + 6)
         : test != std::string::npos ? path.substr(test + 1)
                                     : path;
}

uint32_t place_of(const void* code) {
  static const uintptr_t base = reinterpret_cast<uintptr_t>(own_library().dli_fbase);
  return uint32_t(reinterpret_cast<uintptr_t>(code) - base);
}

// The kernel's own line, where the access is in a function that was inlined from the core's headers.
std::string line_of(uint32_t place) {
  const std::vector<Frame> frames = frames_of(place - 1);  // the call before the return address
  for (const Frame& frame : frames) {
    if (frame.file.compare(0, 5, "simt/") != 0 && frame.file.compare(0, 5, "core/") != 0) return frame.file;
  }
  if (!frames.empty()) return frames.back().file;
  char text[32];
  std::snprintf(text, sizeof(text), "+0x%x", place);
  return text;
}

std::string line_of(Site site) {
  return short_path(site.file_name()) + ":" + std::to_string(site.line());
}

std::string kernel_name() {
  const uint32_t place = place_of(machine.kernel);
  const std::vector<Frame> frames = frames_of(place);
  if (!frames.empty()) return bare_name(frames.back().function);
  char text[32];
  std::snprintf(text, sizeof(text), "kernel +0x%x", place);
  return text;
}

std::string name_of(const Thread& thread) {
  return "block " + index_text(thread.block->index) + " thread " + index_text(thread.index);
}

std::string name_of_thread(uint32_t id) {
  const dim3 &grid = machine.spec.grid, &block = machine.spec.block;
  const uint32_t number = id / machine.threads_of_block, rank = id % machine.threads_of_block;
  const uint3 block_index{number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y)};
  const uint3 index{rank % block.x, rank / block.x % block.y, rank / (block.x * block.y)};
  return "block " + index_text(block_index) + " thread " + index_text(index);
}

// ---- what a kernel asks of its place ----

uint3 thread_idx() noexcept {
  return current->index;
}

uint3 block_idx() noexcept {
  return current->block->index;
}

dim3 block_dim() noexcept {
  return machine.spec.block;
}

dim3 grid_dim() noexcept {
  return machine.spec.grid;
}

int lane_id() noexcept {
  return int(current->rank % kWarpSize);
}

}  // namespace simt
