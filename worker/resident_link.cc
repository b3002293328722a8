#include "worker/resident_link.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/host_id.h"
#include "kernels/base/status_macros.h"
#include "kernels/resident/layout_version.h"
#include "proto/error.h"
#include "proto/grpc_status.h"

namespace clusterkv::worker {

absl::StatusOr<std::unique_ptr<ResidentLink>> ResidentLink::Connect(
    absl::Span<DecodeSession* const> sessions, const Offer& offer) {
  Client* const client = sessions.front()->client();
  v1::ConnectResidentRequest request;
  for (const DecodeSession* session : sessions) {
    if (session->client() != client) {
      return absl::UnavailableError("resident: expected sequences of one server");
    }
    request.add_attachment_ids(session->attachment_id());
  }
  *request.mutable_window() = offer.window;
  request.set_slots(offer.slots);
  request.set_max_exact_tokens(offer.max_exact_tokens);
  request.set_host(kernels::HostId());
  request.set_layout_version(kernels::kResidentLayoutVersion);
  std::unique_ptr<ResidentLink> link(new ResidentLink(client));
  CKV_RETURN_IF_ERROR(FromGrpcStatus(
      client->cache().ConnectResident(client->MakeContext().get(), request, &link->answer_)));
  if (link->answer_.resident_id() == 0) return absl::UnavailableError(link->answer_.reason());
  const auto& begins = link->answer_.window_begin();
  link->window_begin_.assign(begins.begin(), begins.end());
  const size_t expected = sessions.size() * sessions.front()->sequence().shape().layers();
  if (link->window_begin_.size() == expected) return link;
  return Error(v1::INTERNAL_ERROR, absl::StrCat("window_begin: expected ", expected, ", got ",
                                                link->window_begin_.size()));
}

ResidentLink::~ResidentLink() {
  if (answer_.resident_id() == 0) return;
  v1::DisconnectResidentRequest request;
  request.set_resident_id(answer_.resident_id());
  v1::DisconnectResidentResponse answer;
  // Best effort: where the service does not answer, it does not write either.
  client_.cache().DisconnectResident(client_.MakeContext().get(), request, &answer);
}

absl::Status ResidentLink::Renew(uint64_t rounds) {
  v1::RenewResidentRequest request;
  request.set_resident_id(answer_.resident_id());
  request.set_rounds(rounds);
  v1::RenewResidentResponse answer;
  CKV_RETURN_IF_ERROR(
      FromGrpcStatus(client_.cache().RenewResident(client_.MakeContext().get(), request, &answer)));
  const auto& begins = answer.window_begin();
  const bool forward =
      static_cast<size_t>(begins.size()) == window_begin_.size() &&
      std::equal(begins.begin(), begins.end(), window_begin_.begin(), std::greater_equal<>());
  if (!forward) return Error(v1::INTERNAL_ERROR, "window_begin: moved backwards");
  window_begin_.assign(begins.begin(), begins.end());
  return absl::OkStatus();
}

}  // namespace clusterkv::worker
